// Which edges carry the most effect in a run, averaged over its sequences.
// $run: string  a run's key
// $limit: int = 20
MATCH (a:Feature)-[e:INFLUENCES]->(b:Feature)
WHERE e.run = $run
RETURN a.key AS source, a.label AS source_label, b.key AS target, b.label AS target_label, e.weight AS weight, e.abs_weight AS abs_weight, e.n AS n
ORDER BY abs_weight DESC, source, target
LIMIT $limit

// Which features drive one feature, strongest first.
// $run: string  a run's key
// $feature: string  a feature's key
// $limit: int = 20
MATCH (a:Feature)-[e:INFLUENCES]->(b:Feature)
WHERE b.key = $feature AND e.run = $run
RETURN a.key AS source, a.site AS site, a.kind AS kind, a.label AS label, e.weight AS weight, e.abs_weight AS abs_weight, e.n AS n
ORDER BY abs_weight DESC, source
LIMIT $limit

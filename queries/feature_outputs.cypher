// Which features one feature drives, strongest first.
// $run: string  a run's key
// $feature: string  a feature's key
// $limit: int = 20
MATCH (a:Feature)-[e:INFLUENCES]->(b:Feature)
WHERE a.key = $feature AND e.run = $run
RETURN b.key AS target, b.site AS site, b.kind AS kind, b.label AS label, e.weight AS weight, e.abs_weight AS abs_weight, e.n AS n
ORDER BY abs_weight DESC, target
LIMIT $limit

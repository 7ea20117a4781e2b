// Which edges of one run are edges of another run too, between features that match: the edge between their counterparts, strongest first.
// $run: string  a run's key
// $other_run: string  the key of a run of another model, or with other dictionaries
// $limit: int = 100
MATCH (a:Feature)-[e:INFLUENCES]->(b:Feature), (c:Feature)-[f:INFLUENCES]->(d:Feature), (a)-[m:MATCHES]-(c), (b)-[n:MATCHES]-(d)
WHERE e.run = $run AND f.run = $other_run AND m.mutual AND n.mutual AND m.matching = n.matching AND m.method = n.method
RETURN a.key AS source, b.key AS target, e.weight AS weight, c.key AS other_source, d.key AS other_target, f.weight AS other_weight,
       m.score AS source_score, n.score AS target_score, m.method AS method, m.matching AS matching
ORDER BY abs(weight) DESC, source, target, other_source, other_target, method, matching
LIMIT $limit

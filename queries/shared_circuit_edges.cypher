// Which edges of one circuit are edges of another circuit too, between features that match: the edge between their counterparts, strongest first.
// $circuit: string  a circuit's key
// $other_circuit: string  the key of a circuit of another model, or with other dictionaries
// $limit: int = 100
MATCH (a:Feature)-[e:CIRCUIT_EDGE]->(b:Feature), (c:Feature)-[f:CIRCUIT_EDGE]->(d:Feature), (a)-[m:MATCHES]-(c), (b)-[n:MATCHES]-(d)
WHERE e.circuit = $circuit AND f.circuit = $other_circuit AND m.mutual AND n.mutual AND m.matching = n.matching AND m.method = n.method
RETURN a.key AS source, b.key AS target, e.weight AS weight, c.key AS other_source, d.key AS other_target, f.weight AS other_weight,
       m.score AS source_score, n.score AS target_score, m.method AS method, m.matching AS matching
ORDER BY abs(weight) DESC, source, target, other_source, other_target, method, matching
LIMIT $limit

// Which edges a circuit has, between features or between regions, strongest first.
// $circuit: string  a circuit's key
// $limit: int = 1000
MATCH (a:Feature|Block)-[e:CIRCUIT_EDGE]->(b:Feature|Block)
WHERE e.circuit = $circuit
RETURN a.key AS source, a.label AS source_label, b.key AS target, b.label AS target_label, e.weight AS weight, e.ablation_effect AS ablation_effect
ORDER BY abs(weight) DESC, source, target
LIMIT $limit

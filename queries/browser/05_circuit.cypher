// What does a circuit look like?
// The largest saved circuit of at most 150 edges; `featlas analyze circuit --save` saves another.
MATCH (c:Circuit) WHERE c.n_edges <= 150
WITH c.key AS circuit, c.n_edges AS n ORDER BY n DESC, circuit LIMIT 1
MATCH (a:Feature)-[e:CIRCUIT_EDGE]->(b:Feature) WHERE e.circuit = circuit
RETURN a, e, b

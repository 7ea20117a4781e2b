// Which features do most circuits share?
// The three features that are in most saved circuits, with these circuits.
MATCH (f:Feature)-[:IN_CIRCUIT]->(c:Circuit) WHERE f.kind = 'feature'
WITH f, count(c) AS circuits ORDER BY circuits DESC LIMIT 3
MATCH (f)-[m:IN_CIRCUIT]->(c:Circuit)
RETURN f, m, c LIMIT 100

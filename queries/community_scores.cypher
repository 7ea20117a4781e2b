// What each task keeps without a community (completeness), and with it alone (faithfulness), beside random nodes like it.
// $partition: string  a partition's key
MATCH (b:Block)-[:PART_OF]->(p:Partition)
WHERE p.key = $partition
WITH b
MATCH (b)-[:SCORED]->(s:Score)
RETURN b.key AS community, b.label AS label, s.kind AS kind, s.method AS method, s.task AS task, s.metric AS metric, s.baseline AS baseline,
       s.value AS value, s.low AS low, s.high AS high, s.n AS n
ORDER BY community, kind, task, method, metric, baseline, value

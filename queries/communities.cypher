// Which communities a run's graphs were divided into, and the task that each is most attributed to, largest first.
// $run: string  the run
MATCH (p:Partition)-[:OF_RUN]->(r:Run)
WHERE r.key = $run AND p.basis = "effective"
WITH p
MATCH (b:Block)-[:PART_OF]->(p)
RETURN p.key AS partition, p.method AS method, b.key AS community, b.`index` AS number, b.size AS nodes, b.task AS task, b.task_share AS task_share,
       b.label AS label
ORDER BY partition, number, community

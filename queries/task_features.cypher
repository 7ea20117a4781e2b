// Which features send effect onwards in one task of a run and in no other task of it (effect per sequence).
// $run: string  a run's key
// $task: string  a task's name
// $limit: int = 20
MATCH (r:Run)-[:ON_SEQUENCE]->(s:Sequence)
WHERE r.key = $run AND s.task = $task
WITH count(s) AS n_these
MATCH (f:Feature)-[e:ATTRIBUTES]->(:Feature)
WHERE e.run = $run
WITH f, n_these, e.sequence AS sequence, sum(abs(e.weight)) AS effect
MATCH (s:Sequence)
WHERE s.key = sequence
WITH f, n_these, sum(CASE WHEN s.task = $task THEN effect ELSE 0.0 END) AS this_sum, sum(CASE WHEN s.task = $task THEN 0 ELSE 1 END) AS n_elsewhere
WHERE this_sum > 0 AND n_elsewhere = 0
RETURN f.key AS feature, f.kind AS kind, f.label AS label, this_sum / n_these AS effect
ORDER BY effect DESC, feature
LIMIT $limit

// Which features send effect onwards in two tasks of one run, those first that do so most in both (effect per sequence).
// $run: string  a run's key
// $task: string  a task's name
// $other_task: string  another task's name
// $limit: int = 20
MATCH (r:Run)-[:ON_SEQUENCE]->(s:Sequence)
WHERE r.key = $run AND s.task IN [$task, $other_task]
WITH sum(CASE WHEN s.task = $task THEN 1.0 ELSE 0.0 END) AS n_these, sum(CASE WHEN s.task = $other_task THEN 1.0 ELSE 0.0 END) AS n_others
MATCH (f:Feature)-[e:ATTRIBUTES]->(:Feature)
WHERE e.run = $run
WITH f, n_these, n_others, e.sequence AS sequence, sum(abs(e.weight)) AS of_sequence
MATCH (s:Sequence)
WHERE s.key = sequence
WITH f, n_these, n_others, sum(CASE WHEN s.task = $task THEN of_sequence ELSE 0.0 END) AS this_sum,
     sum(CASE WHEN s.task = $other_task THEN of_sequence ELSE 0.0 END) AS other_sum
WHERE this_sum > 0 AND other_sum > 0
WITH f, this_sum / n_these AS effect, other_sum / n_others AS other_effect
RETURN f.key AS feature, f.kind AS kind, f.label AS label, effect, other_effect,
       CASE WHEN effect < other_effect THEN effect ELSE other_effect END AS shared_effect
ORDER BY shared_effect DESC, feature
LIMIT $limit

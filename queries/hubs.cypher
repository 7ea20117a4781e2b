// Which features have the most edges in a run.
// $run: string  a run's key
// $limit: int = 20
MATCH (f:Feature)
OPTIONAL MATCH (f)-[o:INFLUENCES]->(:Feature)
WHERE o.run = $run
WITH f, count(o) AS n_outputs, sum(o.abs_weight) AS output_effect
OPTIONAL MATCH (:Feature)-[i:INFLUENCES]->(f)
WHERE i.run = $run
WITH f, n_outputs, output_effect, count(i) AS n_inputs, sum(i.abs_weight) AS input_effect
WHERE n_inputs + n_outputs > 0
RETURN f.key AS feature, f.kind AS kind, f.label AS label, n_inputs + n_outputs AS degree, n_inputs, n_outputs,
       coalesce(input_effect, 0.0) AS input_effect, coalesce(output_effect, 0.0) AS output_effect
ORDER BY degree DESC, feature
LIMIT $limit

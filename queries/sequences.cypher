// Which sequences a run has done, with the metric on the clean and on the corrupted text.
// $run: string  a run's key
MATCH (r:Run)-[m:ON_SEQUENCE]->(s:Sequence)
WHERE r.key = $run
RETURN s.key AS sequence, s.task AS task, s.clean AS clean, s.corrupt AS corrupt, s.answer AS answer, s.wrong_answer AS wrong_answer,
       m.n_edges AS n_edges, m.metric_clean AS metric_clean, m.metric_corrupt AS metric_corrupt
ORDER BY sequence

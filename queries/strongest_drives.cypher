// Which regions drive each other most in a run; `weight_mean` does not grow with their sizes.
// $run: string  a run's key
// $limit: int = 20
MATCH (a:Block)-[d:DRIVES]->(b:Block)
WHERE d.run = $run
RETURN a.key AS source, a.label AS source_label, a.size AS source_size, b.key AS target, b.label AS target_label, b.size AS target_size,
       d.weight_sum AS weight_sum, d.weight_mean AS weight_mean, d.abs_sum AS abs_sum, d.n AS n
ORDER BY abs_sum DESC, source, target
LIMIT $limit

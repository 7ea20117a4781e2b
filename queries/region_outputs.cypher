// Which regions one region drives, by the sum over all edges between their features, and by the mean of these.
// $run: string  a run's key
// $block: string  a block's key
// $limit: int = 20
MATCH (a:Block)-[d:DRIVES]->(b:Block)
WHERE a.key = $block AND d.run = $run
RETURN b.key AS target, b.site AS site, b.kind AS kind, b.size AS size, b.label AS label, d.weight_sum AS weight_sum, d.weight_mean AS weight_mean,
       d.abs_sum AS abs_sum, d.n AS n
ORDER BY abs_sum DESC, target
LIMIT $limit

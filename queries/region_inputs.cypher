// Which regions drive one region, by the sum over all edges between their features, and by the mean of these.
// $run: string  a run's key
// $block: string  a block's key
// $limit: int = 20
MATCH (a:Block)-[d:DRIVES]->(b:Block)
WHERE b.key = $block AND d.run = $run
RETURN a.key AS source, a.site AS site, a.kind AS kind, a.size AS size, a.label AS label, d.weight_sum AS weight_sum, d.weight_mean AS weight_mean,
       d.abs_sum AS abs_sum, d.n AS n
ORDER BY abs_sum DESC, source
LIMIT $limit

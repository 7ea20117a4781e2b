// Which regions a parcellation has: their size and label, how tightly they belong together, how often they are active, what for.
// $parcellation: string  a parcellation's key
// $limit: int = 1000
MATCH (b:Block)
WHERE b.parcellation = $parcellation AND b.chosen AND NOT b.kind IN ['dead', 'error', 'whole', 'output']
RETURN b.key AS block, b.site AS site, b.`index` AS number, b.size AS size, b.label AS label, b.mean_correlation AS correlation_inside,
       b.mean_correlation_outside AS correlation_outside, b.frequency AS frequency, b.task AS task, b.task_share AS task_share
ORDER BY b.layer, site, number
LIMIT $limit

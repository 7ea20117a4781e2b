// Which edges push the metric up in some sequences and down in others, those first that are most evenly divided.
// $run: string  a run's key
// $limit: int = 20
MATCH (a:Feature)-[e:ATTRIBUTES]->(b:Feature)
WHERE e.run = $run
WITH a.key AS source, b.key AS target, e.sequence AS sequence, sum(e.weight) AS weight
WITH source, target, sum(CASE WHEN weight > 0 THEN 1 ELSE 0 END) AS n_up, sum(CASE WHEN weight < 0 THEN 1 ELSE 0 END) AS n_down,
     max(weight) AS highest, min(weight) AS lowest
WHERE n_up > 0 AND n_down > 0
RETURN source, target, n_up, n_down, highest, lowest
ORDER BY CASE WHEN n_up < n_down THEN n_up ELSE n_down END DESC, highest - lowest DESC, source, target
LIMIT $limit

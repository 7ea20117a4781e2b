// How much of the effect that leaves each layer's sites does so through error nodes, which the dictionaries do not explain.
// $run: string  a run's key
MATCH (a:Feature)-[e:INFLUENCES]->(:Feature)
WHERE e.run = $run
WITH a.layer AS layer, a.site AS site, sum(CASE WHEN a.kind = 'error' THEN e.abs_weight ELSE 0.0 END) AS error_effect, sum(e.abs_weight) AS effect
WHERE effect > 0
RETURN layer, site, error_effect, effect, error_effect / effect AS share
ORDER BY layer, site

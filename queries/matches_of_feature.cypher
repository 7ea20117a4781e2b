// Which features of other models or dictionaries are one with a feature, by their correlation on the same text, best first.
// $feature: string  a feature's key
// $limit: int = 20
MATCH (a:Feature)-[e:MATCHES]-(b:Feature)
WHERE a.key = $feature
RETURN b.key AS match, b.model AS model, b.site AS site, b.label AS label, e.score AS score, e.method AS method, e.mutual AS mutual,
       e.assigned AS assigned, e.matching AS matching
ORDER BY abs(score) DESC, match, method
LIMIT $limit

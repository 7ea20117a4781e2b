// Which pairs of features a matching has found, each the other's nearest, best first.
// $matching: string  a matching's key
// $method: string = "all-sites"  what they were searched among: all-sites or site-pairs
// $limit: int = 100
MATCH (a:Feature)-[e:MATCHES]->(b:Feature)
WHERE e.matching = $matching AND e.method = $method AND e.mutual
RETURN a.key AS feature, a.site AS site, a.label AS label, b.key AS match, b.site AS match_site, b.label AS match_label, e.score AS score
ORDER BY abs(score) DESC, feature, match
LIMIT $limit

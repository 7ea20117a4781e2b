// Which nodes a community has, those that send the most in its run first.
// $community: string  a block's key
// $limit: int = 100
MATCH (f:Feature)-[:MEMBER_OF]->(b:Block)
WHERE b.key = $community
OPTIONAL MATCH (f)-[e:INFLUENCES]->(:Feature)
WITH f, sum(CASE WHEN e.run = b.run THEN e.abs_weight ELSE 0.0 END) AS sent
RETURN f.key AS feature, f.site AS site, f.kind AS kind, f.label AS label, sent
ORDER BY sent DESC, feature
LIMIT $limit

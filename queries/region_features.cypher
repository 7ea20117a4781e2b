// Which features a region is made of, most often active first; of a region of a coarser level, those of all its parts.
// $block: string  a block's key
// $limit: int = 1000
MATCH (f:Feature)-[:MEMBER_OF]->(x:Block)-[:PART_OF*0..9]->(b:Block)
WHERE b.key = $block
RETURN f.key AS feature, f.site AS site, f.kind AS kind, f.`index` AS number, f.label AS label, f.frequency AS frequency, x.key AS part
ORDER BY coalesce(frequency, -1.0) DESC, feature
LIMIT $limit

// In which regions a feature is, at every level of every parcellation, from fine to coarse.
// $feature: string  a feature's key
MATCH (f:Feature)-[:MEMBER_OF]->(x:Block)-[:PART_OF*0..9]->(b:Block)
WHERE f.key = $feature
RETURN b.parcellation AS parcellation, b.method AS method, b.level AS level, b.chosen AS chosen, b.key AS block, b.kind AS kind, b.size AS size,
       b.label AS label
ORDER BY parcellation, level, block

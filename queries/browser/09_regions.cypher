// Which features make up a region?
// The largest region of a parcellation, with its features; `featlas analyze rois` finds regions.
MATCH (b:Block) WHERE b.kind = 'roi' AND b.chosen
WITH b ORDER BY b.size DESC LIMIT 1
MATCH (f:Feature)-[m:MEMBER_OF]->(b)
RETURN f, m, b LIMIT 60

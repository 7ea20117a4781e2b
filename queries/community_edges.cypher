// What a community sends to the other communities of its partition, and reads from them: their edges in the run, summed.
// $community: string  a block's key
MATCH (b:Block)<-[:MEMBER_OF]-(f:Feature)
WHERE b.key = $community
MATCH (f)-[e:INFLUENCES]->(g:Feature)
WITH b, e, g
WHERE e.run = b.run
MATCH (g)-[:MEMBER_OF]->(o:Block)
WITH b, e, o
WHERE o.parcellation = b.parcellation AND o.key <> b.key
RETURN "output" AS direction, o.key AS other, o.label AS label, count(*) AS edges, sum(e.weight) AS weight, sum(e.abs_weight) AS abs_weight
UNION ALL
MATCH (b:Block)<-[:MEMBER_OF]-(f:Feature)
WHERE b.key = $community
MATCH (f)<-[e:INFLUENCES]-(g:Feature)
WITH b, e, g
WHERE e.run = b.run
MATCH (g)-[:MEMBER_OF]->(o:Block)
WITH b, e, o
WHERE o.parcellation = b.parcellation AND o.key <> b.key
RETURN "input" AS direction, o.key AS other, o.label AS label, count(*) AS edges, sum(e.weight) AS weight, sum(e.abs_weight) AS abs_weight

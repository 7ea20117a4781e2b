// What a community sends to the other communities of its partition, and reads from them: their edges in a run, summed, the heaviest first.
// $community: string  a block's key
// $run: string  the run
MATCH (f:Feature)-[e:INFLUENCES]->(g:Feature)
WHERE e.run = $run
WITH f, g, e.weight AS weight, e.abs_weight AS abs_weight
MATCH (f)-[:MEMBER_OF]->(a:Block)
WITH a, g, weight, abs_weight
WHERE a.kind = "community"
MATCH (g)-[:MEMBER_OF]->(c:Block)
WITH a, c, weight, abs_weight
WHERE a.parcellation = c.parcellation AND a.key <> c.key AND (a.key = $community OR c.key = $community)
WITH CASE WHEN a.key = $community THEN "output" ELSE "input" END AS direction, CASE WHEN a.key = $community THEN c.key ELSE a.key END AS other,
     CASE WHEN a.key = $community THEN c.label ELSE a.label END AS label, weight, abs_weight
RETURN direction, other, label, count(*) AS edges, sum(weight) AS weight, sum(abs_weight) AS abs_weight
ORDER BY abs_weight DESC, direction, other

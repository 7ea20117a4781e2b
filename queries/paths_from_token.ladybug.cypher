// The strongest paths from the features at one token of one sequence to the output; a path is as strong as its weakest edge.
// $run: string  a run's key
// $sequence: string  a sequence's key
// $position: int  the token's position from 0; -1 where the run did not keep positions
// $site: string  where the paths begin, for example resid_3
// $least: float  the weakest edge that a path may have: the lower, the more paths there are to be listed
// $longest: count = 6  edges in a path at most
// $limit: int = 20
MATCH p = (a:Feature)-[e:ATTRIBUTES* TRAIL 1..$longest (r, n | WHERE r.run = $run AND r.sequence = $sequence AND abs(r.weight) >= $least)]->(z:Feature)
WHERE a.site = $site AND z.kind = 'output'
  AND list_extract(properties(rels(p), 'src_pos'), 1) = $position
  AND all(i IN range(2, length(p)) WHERE properties(rels(p), 'dest_pos')[i - 1] = properties(rels(p), 'src_pos')[i])
RETURN list_min(list_transform(properties(rels(p), 'weight'), w -> abs(w))) AS strength,
       list_to_string(' > ', properties(nodes(p), 'key')) AS path, list_to_string(' > ', properties(rels(p), 'dest_pos')) AS positions,
       properties(rels(p), 'weight') AS weights
ORDER BY strength DESC, path, positions
LIMIT $limit

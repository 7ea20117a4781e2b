// The strongest paths from the features at one token of one sequence to the output; a path is as strong as its weakest edge.
// $run: string  a run's key
// $sequence: string  a sequence's key
// $position: int  the token's position from 0; -1 where the run did not keep positions
// $site: string  where the paths begin, for example resid_3
// $least: float  the weakest edge that a path may have: the lower, the more paths there are to be listed
// $longest: count = 6  edges in a path at most
// $limit: int = 20
MATCH p = (a:Feature)-[e:ATTRIBUTES*1..$longest]->(z:Feature)
WHERE a.site = $site AND z.kind = 'output' AND all(r IN e WHERE r.run = $run AND r.sequence = $sequence AND abs(r.weight) >= $least)
  AND e[0].src_pos = $position AND all(i IN range(1, size(e) - 1) WHERE e[i - 1].dest_pos = e[i].src_pos)
WITH reduce(path = '', n IN nodes(p) | CASE path WHEN '' THEN n.key ELSE path + ' > ' + n.key END) AS path,
     reduce(text = '', r IN e | CASE text WHEN '' THEN toString(r.dest_pos) ELSE text + ' > ' + toString(r.dest_pos) END) AS positions,
     [r IN e | r.weight] AS weights
RETURN reduce(least = abs(weights[0]), w IN weights | CASE WHEN abs(w) < least THEN abs(w) ELSE least END) AS strength, path, positions, weights
ORDER BY strength DESC, path, positions
LIMIT $limit

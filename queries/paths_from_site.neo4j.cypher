// The strongest paths from a site to the output, averaged over a run; a path is as strong as its weakest edge.
// $run: string  a run's key
// $site: string  where the paths begin, for example resid_3
// $least: float  the least |mean weight| that an edge of a path may have: see top_edges; the lower, the more paths there are to be listed
// $longest: count = 6  edges in a path at most
// $limit: int = 20
MATCH p = (a:Feature)-[e:INFLUENCES*1..$longest]->(z:Feature)
WHERE a.site = $site AND z.kind = 'output' AND all(r IN e WHERE r.run = $run AND abs(r.weight) >= $least)
WITH reduce(path = '', n IN nodes(p) | CASE path WHEN '' THEN n.key ELSE path + ' > ' + n.key END) AS path, [r IN e | r.weight] AS weights
RETURN reduce(least = abs(weights[0]), w IN weights | CASE WHEN abs(w) < least THEN abs(w) ELSE least END) AS strength, path, weights
ORDER BY strength DESC, path
LIMIT $limit

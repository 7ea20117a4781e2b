// The strongest paths from a site to the output, averaged over a run; a path is as strong as its weakest edge.
// $run: string  a run's key
// $site: string  where the paths begin, for example resid_3
// $least: float  the least |mean weight| that an edge of a path may have: see top_edges; the lower, the more paths there are to be listed
// $longest: count = 6  edges in a path at most
// $limit: int = 20
MATCH p = (a:Feature)-[e:INFLUENCES* TRAIL 1..$longest (r, n | WHERE r.run = $run AND abs(r.weight) >= $least)]->(z:Feature)
WHERE a.site = $site AND z.kind = 'output'
RETURN list_min(list_transform(properties(rels(p), 'weight'), w -> abs(w))) AS strength,
       list_to_string(' > ', properties(nodes(p), 'key')) AS path, properties(rels(p), 'weight') AS weights
ORDER BY strength DESC, path
LIMIT $limit

// The strongest paths from a site to the output within a circuit; a path is as strong as its weakest edge.
// $circuit: string  a circuit's key
// $site: string  where the paths begin, for example resid_3
// $longest: count = 12  edges in a path at most
// $limit: int = 20
MATCH p = (a:Feature|Block)-[e:CIRCUIT_EDGE*1..$longest]->(z:Feature|Block)
WHERE a.site = $site AND z.kind = 'output' AND all(r IN e WHERE r.circuit = $circuit)
WITH reduce(path = '', n IN nodes(p) | CASE path WHEN '' THEN n.key ELSE path + ' > ' + n.key END) AS path, [r IN e | r.weight] AS weights
RETURN reduce(least = abs(weights[0]), w IN weights | CASE WHEN abs(w) < least THEN abs(w) ELSE least END) AS strength, path, weights
ORDER BY strength DESC, path
LIMIT $limit

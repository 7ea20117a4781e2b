// The strongest paths from a site to the output within a circuit; a path is as strong as its weakest edge.
// $circuit: string  a circuit's key
// $site: string  where the paths begin, for example resid_3
// $longest: count = 12  edges in a path at most
// $limit: int = 20
MATCH p = (a:Feature|Block)-[e:CIRCUIT_EDGE* TRAIL 1..$longest (r, n | WHERE r.circuit = $circuit)]->(z:Feature|Block)
WHERE a.site = $site AND z.kind = 'output'
RETURN list_min(list_transform(properties(rels(p), 'weight'), w -> abs(w))) AS strength,
       list_to_string(' > ', properties(nodes(p), 'key')) AS path, properties(rels(p), 'weight') AS weights
ORDER BY strength DESC, path
LIMIT $limit

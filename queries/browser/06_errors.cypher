// What do the dictionaries miss?
// The strongest edges out of error nodes: what is not reconstructed and acts all the same.
MATCH (u:Feature)-[e:INFLUENCES]->(d:Feature) WHERE u.kind = 'error'
RETURN u, e, d ORDER BY e.abs_weight DESC LIMIT 25

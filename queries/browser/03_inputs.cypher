// What feeds the feature that moves the output most?
// One step back from the strongest feature: which nodes raise it, and which lower it.
MATCH (f:Feature)-[e:INFLUENCES]->(y:Feature) WHERE y.kind = 'output' AND f.kind = 'feature'
WITH f, e.run AS run, abs(e.weight) AS effect ORDER BY effect DESC LIMIT 1
MATCH (a:Feature)-[i:INFLUENCES]->(f) WHERE i.run = run
RETURN a, i, f ORDER BY i.abs_weight DESC LIMIT 25

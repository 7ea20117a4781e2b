// What moves the output most?
// The nodes with the strongest mean effect on the output, of every run; `weight` is signed, in the metric's units.
MATCH (f:Feature)-[e:INFLUENCES]->(y:Feature) WHERE y.kind = 'output'
RETURN f, e, y ORDER BY abs(e.weight) DESC LIMIT 25

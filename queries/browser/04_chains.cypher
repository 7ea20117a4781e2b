// Which chains of two features end at the output?
// The strongest pairs of steps by the product of their weights, error nodes left aside.
MATCH (a:Feature)-[i:INFLUENCES]->(b:Feature)-[j:INFLUENCES]->(y:Feature)
WHERE y.kind = 'output' AND a.kind = 'feature' AND b.kind = 'feature' AND i.run = j.run
RETURN a, i, b, j, y ORDER BY abs(i.weight * j.weight) DESC LIMIT 20

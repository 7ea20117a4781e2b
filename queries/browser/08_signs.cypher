// Which edges raise on some prompts and lower on others?
// Edges whose mean magnitude is large and whose mean is near zero: the sign depends on the prompt.
MATCH (u:Feature)-[e:INFLUENCES]->(d:Feature)
WHERE e.n > 1 AND e.abs_weight > 4 * abs(e.weight)
RETURN u, e, d ORDER BY e.abs_weight DESC LIMIT 25

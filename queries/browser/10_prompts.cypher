// On which prompts does the model do worst?
// The prompts with the lowest metric on the clean text, with their runs.
MATCH (r:Run)-[o:ON_SEQUENCE]->(s:Sequence) WHERE o.metric_clean IS NOT NULL
RETURN r, o, s ORDER BY o.metric_clean LIMIT 15

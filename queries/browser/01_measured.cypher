// What has been measured?
// Every run, its model and a few of the prompts it measured. Click a run: metric, baseline, steps and threshold are its properties.
MATCH (r:Run)-[m:OF_MODEL]->(model:Model)
MATCH (r)-[o:ON_SEQUENCE]->(s:Sequence)
RETURN r, m, model, o, s LIMIT 40

// Which runs are in the graph, what each measured and with which settings.
MATCH (r:Run)
RETURN r.key AS run, r.status AS status, r.model AS model, r.dictionaries AS dictionaries, r.task AS task, r.method AS method, r.steps AS steps,
       r.metric AS metric, r.baseline AS baseline, r.threshold AS threshold, r.aggregation AS aggregation, r.seed AS seed,
       r.n_sequences AS n_sequences, r.n_edges AS n_edges
ORDER BY run

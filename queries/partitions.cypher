// Which partitions of a site's features into regions are in the graph, by which method, from which samples.
MATCH (p:Partition)
RETURN p.parcellation AS parcellation, p.site AS site, p.method AS method, p.basis AS basis, p.n_blocks AS n_blocks, p.level AS level,
       p.dictionary AS dictionary, p.run AS samples, p.model AS model
ORDER BY parcellation, site

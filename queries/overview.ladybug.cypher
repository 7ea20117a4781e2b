// How many nodes of each label and edges of each type the graph has.
MATCH (n) WITH label(n) AS name, count(*) AS n WHERE name <> 'Meta' RETURN 'node' AS what, name, n ORDER BY name
UNION ALL
MATCH ()-[e]->() WITH label(e) AS name, count(*) AS n RETURN 'edge' AS what, name, n ORDER BY name

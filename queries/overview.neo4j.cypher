// How many nodes of each label and edges of each type the graph has.
CALL () {
  MATCH (n) UNWIND labels(n) AS name WITH name WHERE name <> 'Meta' RETURN 'node' AS what, name, count(*) AS n
  UNION ALL
  MATCH ()-[e]->() RETURN 'edge' AS what, type(e) AS name, count(*) AS n
}
RETURN what, name, n
ORDER BY what DESC, name

// What a node is joined to; memberships first, then the heaviest edges. Those of single sequences and circuits, which a run sums up, are left out.
// $key: string  the key of a feature, circuit, block or any other node
// $limit: int = 25
MATCH (a)-[e]-(b)
WHERE a.key = $key AND e.sequence IS NULL AND e.circuit IS NULL
RETURN a AS node, e AS edge, b AS neighbour
ORDER BY CASE WHEN e.abs_weight IS NOT NULL THEN e.abs_weight WHEN e.weight IS NOT NULL THEN abs(e.weight) ELSE 1.0 END DESC, b.key
LIMIT $limit

// The same circuit, its edges' widths by weight
// Blue raises, red lowers; five widths by the root of |weight| over the circuit's greatest. `featlas neo4j browser --circuit KEY` draws one.
MATCH (a:Feature)-[e:RAISES_1|RAISES_2|RAISES_3|RAISES_4|RAISES_5|LOWERS_1|LOWERS_2|LOWERS_3|LOWERS_4|LOWERS_5]->(b:Feature)
RETURN a, e, b LIMIT 200

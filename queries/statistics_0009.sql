-- Rankings of a run's nodes, or of its paths: by PageRank, influence, betweenness or strength, by the strongest paths between two nodes. Times are UTC.

-- `ranking` is its key, a content hash of run, method, basis and settings; `basis` says who computed it, local (featlas) or gds (Neo4j's Graph Data
-- Science on the server); `settings` is JSON. The same asked again is written in place of what was there.
CREATE TABLE rankings (
    ranking VARCHAR NOT NULL,
    run VARCHAR NOT NULL,
    method VARCHAR NOT NULL,
    basis VARCHAR NOT NULL,
    settings VARCHAR NOT NULL,
    finished TIMESTAMP NOT NULL
);

-- `key` is a node's, or a path's nodes' keys with ` > ` between them; `rank` counts from 1, the greatest value first.
CREATE TABLE ranking_values (
    ranking VARCHAR NOT NULL,
    key VARCHAR NOT NULL,
    value DOUBLE NOT NULL,
    rank BIGINT NOT NULL
);

// Which features have a text in their label.
// $text: string  part of the label, as it is written
// $limit: int = 20
MATCH (f:Feature)
WHERE f.label CONTAINS $text
RETURN f.key AS feature, f.site AS site, f.`index` AS number, f.label AS label, f.label_kind AS label_kind, f.frequency AS frequency
ORDER BY feature
LIMIT $limit

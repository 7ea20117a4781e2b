// Are regions merely a smaller dictionary? Whether features that fire together also write in one direction: correlations beside decoder cosines.
// $parcellation: string  a parcellation's key
// $limit: int = 1000
MATCH (b:Block)
WHERE b.parcellation = $parcellation AND b.chosen AND b.mean_correlation IS NOT NULL
RETURN b.key AS block, b.site AS site, b.size AS size, b.label AS label, b.mean_correlation - b.mean_correlation_outside AS correlation_gain,
       b.mean_cosine - b.mean_cosine_outside AS cosine_gain, b.mean_correlation AS correlation_inside,
       b.mean_correlation_outside AS correlation_outside, b.mean_cosine AS cosine_inside, b.mean_cosine_outside AS cosine_outside
ORDER BY coalesce(cosine_gain, -2.0) DESC, block
LIMIT $limit

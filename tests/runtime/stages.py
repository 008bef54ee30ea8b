"""Attention in several stages, by name."""

from __future__ import annotations

STAGES = {
    "two hops": '''"""What keys point to is read through what queries point to."""

kernel a(q[b,h,i,d], p[b,h,l,d], k[b,h,j,d], v[b,h,j,e]) -> o[b,h,i,e]:
    first = softmax[l](sum[d](q * p) / sqrt(size(d)))
    second = softmax[j](sum[d](p * k) / sqrt(size(d)))
    o = sum[l](first * sum[j](second * v))
''',
    "projected": '''"""Positions are projected to fewer (Wang et al., 2020), causal by blocks."""

kernel a(q[b,h,i,d], k[b,h,j,d], v[b,h,j,e], proj[p,j]) -> o[b,h,i,e]:
    few_k = sum[j](proj * k)
    few_v = sum[j](proj * v)
    s = sum[d](q * few_k) / sqrt(size(d))
    o = sum[p](softmax[p where 4 * p <= i](s) * few_v)
''',
    "landmarks": '''"""Means of neighbours stand for queries and keys (Xiong et al., 2021, without the inverse)."""

kernel a(q[b,h,i,d], k[b,h,j,d], v[b,h,j,e]) -> o[b,h,i,e]:
    param landmarks: int = 8
    axis m = landmarks
    axis n = landmarks
    few_q = mean[i where i * landmarks // size(i) == m](q)
    few_k = mean[j where j * landmarks // size(j) == n](k)
    left = softmax[n](sum[d](q * few_k) / sqrt(size(d)))
    centre = softmax[n](sum[d](few_q * few_k) / sqrt(size(d)))
    right = sum[j](softmax[j](sum[d](few_q * k) / sqrt(size(d))) * v)
    o = sum[n](left * sum[m](centre * right))
''',
    "induced": '''"""Induced set attention (Lee et al., 2019), with keys of their own."""

kernel a(q[b,h,i,d], k[b,h,j,d], v[b,h,j,e], points[h,l,d], w[h,l,d]) -> o[b,h,i,e]:
    inner = sum[j](softmax[j](sum[d](points * k) / sqrt(size(d))) * v)
    o = sum[l](softmax[l](sum[d](q * w) / sqrt(size(d))) * inner)
''',
}

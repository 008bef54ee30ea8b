"""Recurrences whose steps read, scan or choose along axes of what they make of their states, by name."""

from __future__ import annotations

STEP_READS = {
    "gates of one tensor": '''"""An LSTM with four gates in a tensor."""

kernel a(x[b,t,g,n], w[m,g,n]) -> y[b,t,n]:
    axis g = 4
    sample w = normal() / sqrt(size(n))
    state y[b,n] along t
    state c[b,n] along t
    z = x + sum[m](y[n -> m] * w)
    gate = where(g == 3, tanh(z), sigmoid(z))
    c <- gate[g -> 1] * c + gate[g -> 0] * gate[g -> 3]
    y <- gate[g -> 2] * tanh(c)
''',
    "normalised": '''"""Two places are read of what was normalised along one of them."""

kernel a(x[b,t,g,c,n], w[g,c]) -> y[b,t,n]:
    axis g = 3
    axis c = 2
    state y[b,n] along t
    p = softmax[g](x + y * w)
    y <- tanh(p[g -> 0, c -> 1] + 2 * p[g -> 2, c -> 0] + p[g -> 1][c -> 1])
''',
    "beyond the axis": '''"""A read beyond an axis is 0, whatever is read."""

kernel a(x[b,t,g,n], w[m,g,n]) -> y[b,t,n]:
    axis g = 2
    sample w = normal() / sqrt(size(n))
    state y[b,n] along t
    z = cos(x + sum[m](y[n -> m] * w))
    y <- tanh(z[g -> 1] + z[g -> 2] + cos(y)[n -> n + 3])
''',
    "stack": '''"""A stack: what is pushed moves the rest."""

kernel a(x[b,t,n], push[b,t]) -> y[b,t,n], S[b,n]:
    sample push = sigmoid(normal())
    state S[b,n] along t
    S <- push * (S[n -> n - 1] + x) + (1 - push) * S[n -> n + 1]
    y = S[n -> 1] * x
''',
    "complex": '''"""A complex number in two of an axis."""

kernel a(x[b,t,n,c], nu[n], theta[n]) -> y[b,t,n,c]:
    axis c = 2
    state h[b,n,c] along t
    decay = exp(-exp(nu))
    h <- decay * (cos(theta) * h + where(c == 0, -sin(theta), sin(theta)) * h[c -> 1 - c]) + x
    y = h
''',
    "by number": '''"""The parts of a complex number by their places."""

kernel a(x[b,t,n,c], nu[n], theta[n]) -> y[b,t,n]:
    axis c = 2
    state h[b,n,c] along t
    re = exp(-exp(nu)) * cos(theta)
    im = exp(-exp(nu)) * sin(theta)
    h <- where(c == 0, re * h[c -> 0] - im * h[c -> 1], re * h[c -> 1] + im * h[c -> 0]) + x
    y = h[c -> 0]
''',
    "complex matrix": '''"""Complex states of several features, of which an output reads both parts."""

kernel a(x[b,t,p], dt[b,t], decay[n], turn[n], write[b,t,n,c], read[b,t,n,c]) -> y[b,t,p]:
    axis c = 2
    sample dt = softplus(normal()) / 4
    state S[b,p,n,c] along t
    angle = dt * turn
    S <- exp(-dt * softplus(decay)) * (cos(angle) * S + where(c == 0, -sin(angle), sin(angle)) * S[c -> 1 - c]) + dt * x * write
    y = sum[n](S[c -> 0] * read[c -> 0] - S[c -> 1] * read[c -> 1])
''',
    "pairs": '''"""Pairs of features turned by angles that the input says."""

kernel a(x[b,t,n], angle[b,t,m], q[b,t,n]) -> y[b,t,n]:
    axis m = (size(n) + 1) // 2
    state S[b,n] along t
    turn = angle[m -> n // 2]
    S <- 0.9 * (cos(turn) * S + sin(turn) * where(n % 2 == 0, -S[n -> n + 1], S[n -> n - 1])) + x
    y = S[n -> n - 1] * q
''',
    "ordered": '''"""An LSTM of ordered neurons (Shen et al., 2019): gates that are running sums."""

kernel a(x[b,t,g,n], w[m,g,n]) -> y[b,t,n]:
    axis g = 6
    sample w = normal() / sqrt(size(n))
    state y[b,n] along t
    state c[b,n] along t
    z = x + sum[m](y[n -> m] * w)
    kept = cumsum[n](softmax[n](z[g -> 4]))
    written = 1 - cumsum[n](softmax[n](z[g -> 5]))
    both = kept * written
    c <- (sigmoid(z[g -> 0]) * both + kept - both) * c + (sigmoid(z[g -> 1]) * both + written - both) * tanh(z[g -> 3])
    y <- sigmoid(z[g -> 2]) * tanh(c)
''',
    "scans": '''"""Scans, both ways, with and without the own position, of what is masked."""

kernel a(x[b,t,n], keep[b,n]: bool) -> y[b,t,n]:
    state y[b,n] along t
    before = cumlse[n, exclusive](y)
    y <- tanh(cumsum[n, reverse, exclusive](y / 9) + cummax[n](where(keep, y, -2)) + where(n == 0, 0, before) / 4 + x)
''',
    "scans of scans": '''"""What a step has scanned it scans again, and reads elsewhere."""

kernel a(x[b,t,n]) -> y[b,t,n]:
    state y[b,n] along t
    once = cumsum[n](y / 4)
    twice = cumsum[n, reverse](once[n -> n - 1] / 4)
    y <- tanh(twice[n -> size(n) - 1 - n] + x)
''',
    "after": '''"""Outputs that scan what steps store, and choose from it."""

kernel a(x[b,t,n], q[b,t,n]) -> y[b,t,n], z[b,t], o[b,t,n]:
    param k: int = 2
    state y[b,n] along t
    y <- y / 2 + x
    z = sum[n](q * cummax[n](y * q))
    o = where(topk[n](y, k), y, 0) + cumsum[n, exclusive](y)
''',
    "largest": '''"""Only the largest of all answers."""

kernel a(x[b,t,n], w[m,n]) -> y[b,t,n]:
    param k: int = 3
    sample w = normal() / sqrt(size(n))
    state y[b,n] along t
    z = x + sum[m](y[n -> m] * w)
    y <- where(topk[n](z, k), tanh(z), 0) + min(argmax[n](y), 2) / 8
''',
    "running maximum": '''"""A maximum of those before: its gradient goes to one of them."""

kernel a(x[b,t,n], start[m]) -> y[b,t,n]:
    axis m = size(n)
    state y[b,n] along t
    y <- tanh(x + max[m where m <= n](y[n -> m] + start))
''',
    "tape": '''"""A tape with a head that moves round: what it reads is interpolated (Graves et al., 2014, without sharpening)."""

kernel a(k[b,t,d], gate[b,t], shift[b,t,s], erase[b,t,d], write[b,t,d]) -> r[b,t,d]:
    axis s = 3
    axis n = 7
    state M[b,n,d] along t
    state w[b,n] along t
    found = softmax[n](sum[d](k * M))
    near = sigmoid(gate) * found + (1 - sigmoid(gate)) * w
    w <- sum[s](softmax[s](shift) * near[n -> (n + s - 1) % size(n)])
    M <- M * (1 - w * sigmoid(erase)) + w * write
    r = sum[n](w * M)
''',
}

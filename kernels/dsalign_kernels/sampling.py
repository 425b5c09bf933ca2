import numpy as np, torch
from types import SimpleNamespace
M=np.uint32
def rotl(x,r): return (x<<M(r))|(x>>M(32-r))
def mixk(h,k):
    k=k*M(0xcc9e2d51); k=rotl(k,15); k=k*M(0x1b873593); h=h^k; h=rotl(h,13); return h*M(5)+M(0xe6546b64)
def gum(keys,pos,V):
    k=keys.numpy().view(np.uint64); h=np.zeros(len(k),M)
    h=mixk(h,(k&np.uint64(0xffffffff)).astype(M)); h=mixk(h,(k>>np.uint64(32)).astype(M)); h=mixk(h,pos.numpy().astype(M))
    h=mixk(h[:,None],np.arange(V,dtype=M)[None]); h=h^M(16); h=h^(h>>M(16)); h=h*M(0x85ebca6b); h=h^(h>>M(13)); h=h*M(0xc2b2ae35); h=h^(h>>M(16))
    u=np.minimum((h.astype(np.float32)+np.float32(.5))*np.float32(2**-32),np.float32(1-2**-24))
    return torch.from_numpy(-np.log(-np.log1p(-u)))
def sample_tokens(logits,keys,positions,*,temperature=1.,top_k=0,top_p=1.,scale=1.,softcap=None,impl="auto"):
    z=logits.float()*scale
    if softcap: z=softcap*torch.tanh(z/softcap)
    z=z/temperature
    lse=torch.logsumexp(z,-1)
    if top_k==1: t=z.argmax(-1)
    else: t=(z+gum(keys.cpu(),positions.cpu(),z.shape[1])).argmax(-1)
    return SimpleNamespace(tokens=t,logps=z.gather(1,t[:,None])[:,0]-lse)
def sm(z):
    m=2**64-1; z=(z+0x9E3779B97F4A7C15)&m; z=((z^z>>30)*0xBF58476D1CE4E5B9)&m; z=((z^z>>27)*0x94D049BB133111EB)&m; return z^z>>31
def token_key(*a):
    h=0
    for x in a: h=sm(h^(x%2**64))
    return h

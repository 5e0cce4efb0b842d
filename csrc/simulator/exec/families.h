// The instruction families that opcode_table.cpp searches, each defined by the file of its name.
#pragma once

#include "simulator/core/decoder.h"

namespace fused_peft::sim {

extern const OpcodeFamily
    kArithmeticFamily;  // arithmetic.cpp: add sub mul mad fma div rem abs neg min max ...
extern const OpcodeFamily kFloatFamily;  // float.cpp: copysign
extern const OpcodeFamily kCarryFamily;  // carry.cpp: addc subc madc
extern const OpcodeFamily kBitsFamily;  // bits.cpp: and or xor not shl shr shf bfe bfi popc clz ...
extern const OpcodeFamily kPermuteFamily;     // permute.cpp: lop3 prmt
extern const OpcodeFamily kPredicateFamily;   // predicate.cpp: setp set
extern const OpcodeFamily kSelectFamily;      // select.cpp: selp slct testp
extern const OpcodeFamily kMoveFamily;        // move.cpp: mov
extern const OpcodeFamily kConvertFamily;     // convert.cpp: cvt
extern const OpcodeFamily kMathFamily;        // math.cpp: rcp sqrt rsqrt ex2 lg2 sin cos tanh
extern const OpcodeFamily kDotFamily;         // dot.cpp: dp4a dp2a sad mul24 mad24
extern const OpcodeFamily kVideoFamily;       // video.cpp: vadd4 vabsdiff4 ...
extern const OpcodeFamily kMmaFamily;         // mma.cpp: mma
extern const OpcodeFamily kWgmmaFamily;       // wgmma.cpp: wgmma
extern const OpcodeFamily kMatrixMoveFamily;  // ldmatrix.cpp: ldmatrix stmatrix movmatrix
extern const OpcodeFamily kBarrierFamily;     // barrier.cpp: bar barrier
extern const OpcodeFamily
    kControlFamily;                       // control.cpp: bra brx exit trap nanosleep setmaxnreg ...
extern const OpcodeFamily kCallFamily;    // call.cpp: vprintf __assertfail malloc free
extern const OpcodeFamily kWarpFamily;    // warp_ops.cpp: shfl vote match redux activemask elect
extern const OpcodeFamily kFenceFamily;   // fence.cpp: membar fence
extern const OpcodeFamily kMemoryFamily;  // memory.cpp: ld ldu st prefetch createpolicy ...
extern const OpcodeFamily kAtomicFamily;  // atomic.cpp: atom red
extern const OpcodeFamily kAddressFamily;     // address.cpp: cvta isspacep mapa getctarank
extern const OpcodeFamily kAsyncCopyFamily;   // async_copy.cpp: cp
extern const OpcodeFamily kMbarrierFamily;    // mbarrier.cpp: mbarrier cp.async.mbarrier
extern const OpcodeFamily kBulkFamily;        // bulk.cpp: cp.async.bulk cp.reduce
extern const OpcodeFamily kStoreAsyncFamily;  // store_async.cpp: st.async red.async
extern const OpcodeFamily kTensorMapFamily;   // tensor_map.cpp: tensormap
extern const OpcodeFamily kProxyFenceFamily;  // proxy_fence.cpp: fence.proxy

}  // namespace fused_peft::sim

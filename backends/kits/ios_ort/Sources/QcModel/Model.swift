import Foundation
import OnnxRuntimeBindings

/// The model in ONNX Runtime. For one task at a time.
public final class Model {
    private static let files = ["model.ort"]

    private let environment: ORTEnv
    private let session: ORTSession
    private let text: Text?

    /// Checks the runtime's version and every file against the manifest, then loads the model.
    ///
    /// - Parameter threads: For computing; the performance cores of most phones if absent.
    public init(_ directory: URL, threads: Int32 = 2) async throws {
        try Artifact.check(directory, Self.files, runtime: ORTVersion() ?? "0")
        environment = try ORTEnv(loggingLevel: .warning)
        let options = try ORTSessionOptions()
        try options.setIntraOpNumThreads(threads)
        let file = directory.appendingPathComponent("model.ort").path
        session = try ORTSession(env: environment, modelPath: file, sessionOptions: options)
        text = Interface.hasTokenizer ? try await Text(directory) : nil
    }

    /// Runs once. Names: `Inputs` and `Outputs`.
    public func run(_ inputs: [String: ORTValue]) throws -> [String: ORTValue] {
        try session.run(withInputs: inputs, outputNames: Set(Interface.outputs.map(\.name)), runOptions: nil)
    }

    /// Calls `onToken` with each token of the continuation, the most probable ones, until it returns false.
    public func generate(tokens: [Int], maxTokens: Int = 64, onToken: (Int) -> Bool) throws {
        precondition(Interface.task == "generate", "this model cannot generate; it can \(Interface.task)")
        precondition((1..<Interface.limit).contains(tokens.count), "expected 1 to \(Interface.limit - 1) tokens")
        guard let logits = Interface.outputs.first(where: { $0.role == "logits" }) else { return }
        var caches: [String: ORTValue] = [:]
        var fresh = tokens
        var past = 0
        for _ in 0..<min(maxTokens, Interface.limit - tokens.count) {
            let outputs = try run(textInputs(fresh, past).merging(caches) { $1 })
            guard let found = outputs[logits.name] else { return }
            let token = best(try floats(found), width: logits.shape.last.flatMap { $0 })
            if Interface.stop.contains(token) || !onToken(token) { return }
            for (before, after) in Interface.caches { caches[before] = outputs[after] }
            past = Interface.caches.isEmpty ? 0 : past + fresh.count
            fresh = Interface.caches.isEmpty ? fresh + [token] : [token]
        }
    }

    /// The continuation of a text, piece by piece.
    public func generate(_ prompt: String, maxTokens: Int = 64) -> AsyncThrowingStream<String, Error> {
        stream(text) { text, onToken in
            try self.generate(tokens: text.prompt(prompt), maxTokens: maxTokens, onToken: onToken)
        }
    }

    /// The vector of a sentence; see `similarity`.
    public func embed(_ sentence: String) throws -> [Float] {
        precondition(Interface.task == "embed", "this model cannot embed; it can \(Interface.task)")
        let tokens = try need(text).sentence(sentence)
        let outputs = try run(textInputs(tokens, 0))
        if let whole = Interface.outputs.first(where: { $0.role == "embedding" }), let found = outputs[whole.name] {
            return try floats(found)
        }
        guard let hidden = Interface.outputs.first(where: { $0.role == "hidden" }), let found = outputs[hidden.name] else {
            return []
        }
        return pooled(try floats(found), tokens.count)
    }

    private func textInputs(_ tokens: [Int], _ past: Int) throws -> [String: ORTValue] {
        var made: [String: ORTValue] = [:]
        for port in Interface.inputs {
            if port.role.hasPrefix("past_") {
                // Of the axes of any length the first is the batch, the others time.
                let shape = port.shape.enumerated().map { axis, size in size ?? (axis == 0 ? 1 : 0) }
                if past == 0 { made[port.name] = try value([Float](), .float, shape) }
                continue
            }
            let numbers: [Int]
            switch port.role {
            case "tokens": numbers = tokens
            case "mask": numbers = [Int](repeating: 1, count: past + tokens.count)
            case "positions": numbers = Array(past..<(past + tokens.count))
            default: numbers = [Int](repeating: 0, count: tokens.count)
            }
            let shape = port.shape.count == 1 ? [numbers.count] : [1, numbers.count]
            switch port.type {
            case "int64": made[port.name] = try value(numbers.map(Int64.init), .int64, shape)
            case "int32": made[port.name] = try value(numbers.map(Int32.init), .int32, shape)
            default: made[port.name] = try value(numbers.map(Float.init), .float, shape)
            }
        }
        return made
    }

    private func value<Element>(_ numbers: [Element], _ type: ORTTensorElementDataType, _ shape: [Int]) throws -> ORTValue {
        let bytes = numbers.withUnsafeBytes { Data($0) }
        let data = NSMutableData(data: bytes.isEmpty ? Data(count: 8) : bytes) // an address, for an empty cache too
        return try ORTValue(tensorData: data, elementType: type, shape: shape.map { NSNumber(value: $0) })
    }

    private func floats(_ value: ORTValue) throws -> [Float] {
        try (value.tensorData() as Data).withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }
    }
}

/// The most probable token at the last position.
private func best(_ logits: [Float], width: Int?) -> Int {
    let last = logits.suffix(width ?? logits.count)
    return last.indices.max { last[$0] < last[$1] }.map { $0 - last.startIndex } ?? 0
}
